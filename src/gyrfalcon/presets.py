"""The model catalogue: checkpoints that are served under a short name.

What they take is worked out from their config.json (`gyrfalcon.footprint`), which comes with the package: planning
for a model needs neither its weights nor a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from gyrfalcon.errors import ModelLoadError

BUNDLED = "eyas"


@dataclass(frozen=True, slots=True)
class Preset:
    """A checkpoint known by name.

    source: id on the Hugging Face Hub, None for the checkpoint that comes with the package. workload: the Kubernetes
    kind it runs as. is_distributed: needs more than one machine.
    """

    name: str
    source: str | None
    summary: str
    licence: str = "Apache-2.0"
    workload: str = "Deployment"
    is_distributed: bool = False

    @property
    def command(self) -> str:
        """The command that serves it."""
        return f"gyrfalcon serve {self.name}"

    @property
    def config_folder(self) -> Path:
        """A folder with its config.json; only the bundled checkpoint's has the weights too."""
        if self.source is None:
            return bundled_folder()
        return Path(str(resources.files("gyrfalcon").joinpath("catalogue", self.name)))

    @property
    def manifest(self) -> str:
        """Its Kubernetes objects, as a file of this project's repository."""
        return f"deploy/kubernetes/{self.name}.yaml"

    @property
    def workspace(self) -> str:
        """Its KAITO Workspace, as a file of this project's repository."""
        return f"deploy/kaito/{self.name}.yaml"


def bundled_folder() -> Path:
    """The folder of `eyas`, the checkpoint that comes with the package."""
    return Path(str(resources.files("gyrfalcon").joinpath(BUNDLED)))


def catalogue() -> tuple[Preset, ...]:
    """All presets, the bundled one first. Raises ModelLoadError when the package's own files are damaged."""
    for preset in (_EYAS, *PUBLISHED):
        if not (preset.config_folder / "config.json").is_file():
            raise ModelLoadError(f"`{preset.config_folder}`, part of this package, is damaged; install gyrfalcon anew")
    return (_EYAS, *PUBLISHED)


def find_preset(name: str) -> Preset | None:
    """The preset of that name."""
    return next((preset for preset in (_EYAS, *PUBLISHED) if preset.name == name), None)


_EYAS = Preset(BUNDLED, None, "small demonstration model that comes with the package")
_TII = "TII Falcon-LLM 2.0"

PUBLISHED = (
    Preset("falcon-7b", "tiiuae/falcon-7b", "base model, multi-query attention"),
    Preset("falcon-7b-instruct", "tiiuae/falcon-7b-instruct", "falcon-7b tuned on chats and instructions"),
    Preset("falcon-40b", "tiiuae/falcon-40b", "base model, 8 key/value heads"),
    Preset("falcon-40b-instruct", "tiiuae/falcon-40b-instruct", "falcon-40b tuned on chats and instructions"),
    Preset("falcon-11b", "tiiuae/falcon-11B", "Falcon 2, base model with 8k context", _TII),
    Preset("falcon3-1b-instruct", "tiiuae/Falcon3-1B-Instruct", "Falcon 3 of Llama's architecture", _TII),
    Preset("falcon3-3b-instruct", "tiiuae/Falcon3-3B-Instruct", "the same with 32k context", _TII),
    Preset("falcon3-7b-instruct", "tiiuae/Falcon3-7B-Instruct", "the same with 32k context", _TII),
    Preset("falcon3-10b-instruct", "tiiuae/Falcon3-10B-Instruct", "the same with 32k context", _TII),
    Preset("tinyllama-1.1b-chat", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "small Llama tuned on chats"),
    Preset("smollm2-1.7b-instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "small Llama tuned on instructions"),
    Preset("mistral-7b-instruct-v0.3", "mistralai/Mistral-7B-Instruct-v0.3", "Mistral without a sliding window; gated"),
)

NAMES = (BUNDLED, *(preset.name for preset in PUBLISHED))
