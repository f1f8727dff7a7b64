"""What each option of KAITO's inference service means to us: honoured, without effect, or refused.

The one table behind `gyrfalcon kaito` and docs/kaito-service.md: what the service took in its releases 0.1 to 0.9.
"""

from __future__ import annotations

from functools import partial

from gyrfalcon import config, options
from gyrfalcon.cli import foreign_options
from gyrfalcon.cli.foreign_options import ForeignOption

FIRST_PORT = 5000
LAST_RANK = 65535 - FIRST_PORT
MAIN = "main"
# Where the service's images keep the weights: up to release 0.3, and from 0.4 on.
WEIGHTS_FOLDERS = ("workspace/tfs/weights", "workspace/weights")
ADAPTERS_FOLDER = "mnt/adapter"

# Its options have no variables.
_honoured = partial(foreign_options.honoured, has_variable=False)
_no_effect = partial(foreign_options.no_effect, has_variable=False)
_refused = partial(foreign_options.refused, has_variable=False)

_NOT_QUANTISED = "weights are served in the precision of --torch_dtype"
_NO_ADAPTERS = "adapters are not served in this version"

KAITO_OPTIONS: tuple[ForeignOption, ...] = (
    _honoured(
        "--pipeline",
        "kaito_pipeline",
        note="What /chat continues: a prompt (text-generation), or messages by the chat template (conversational).",
    ),
    _honoured(
        "--pretrained_model_name_or_path",
        "model",
        note="Checkpoint folder, preset or Hub id; what is no folder and not in the Hub's cache needs "
        "--allow_remote_files. Absent: the first folder there is of "
        + " and ".join(f"/{folder}" for folder in WEIGHTS_FOLDERS)
        + ".",
        default=f"/{WEIGHTS_FOLDERS[0]}",
    ),
    _honoured(
        "--torch_dtype",
        "dtype",
        kind=options.one_of("float32", "float16", "bfloat16", "auto", synonyms={"float": "float32", "half": "float16"}),
        note="Precision of weights and cache; auto takes the checkpoint's. `float` and `half` are other names.",
    ),
    _honoured(
        "--device_map",
        "device",
        kind=options.one_of(
            "auto", "balanced", "balanced_low_0", "sequential", "cpu", "cuda", synonyms={"cuda:0": "cuda"}
        ),
        note="Where the model runs: cpu, cuda (also cuda:0), or auto, which takes a GPU if there is one. The ways to "
        "spread it over several GPUs (balanced, balanced_low_0, sequential) mean auto, with a line.",
    ),
    _honoured(
        "--allow_remote_files",
        "offline",
        kind=options.switch(),
        note="Download what is not in the Hub's cache; without it nothing is downloaded.",
    ),
    _honoured("--revision", "revision", default=MAIN),
    _honoured("--cache_dir", "huggingface_hub_cache"),
    _honoured(
        "--chat_template",
        "chat_template",
        note="A chat template in place of the model's: a file, or its text, told by a brace or a line break in it.",
    ),
    _honoured(
        "--served_model_name",
        "served_model_name",
        note="The model's name in answers and in the `model` field; the path or id that was given if absent.",
    ),
    _no_effect("--trust_remote_code", options.switch(), config.REFUSED["trust_remote_code"], False),
    _no_effect("--disable_trust_remote_code", options.switch(), config.REFUSED["trust_remote_code"], True),
    _no_effect(
        "--force_download", options.switch(), "what the Hub's cache holds is checked and not fetched anew", False
    ),
    _no_effect(
        "--resume_download", options.switch(), "downloads that were cut off always go on where they ended", True
    ),
    _no_effect(
        "--proxies",
        options.text(),
        "the Hub library reads the variables HTTP_PROXY and HTTPS_PROXY",
        secret=True,  # the address of a proxy may hold a password
    ),
    _no_effect("--output_loading_info", options.switch(), "what a checkpoint lacks or has too much is an error", False),
    _no_effect("--combination_type", options.text(), _NO_ADAPTERS, "svd"),
    _refused(
        "--load_in_4bit",
        options.switch(),
        _NOT_QUANTISED,
        False,
        remedy="leave it out, and give the memory that --torch_dtype takes",
    ),
    _refused(
        "--load_in_8bit",
        options.switch(),
        _NOT_QUANTISED,
        False,
        remedy="leave it out, and give the memory that --torch_dtype takes",
    ),
    _refused(
        "--from_tf",
        options.switch(),
        "weights are read from safetensors files",
        False,
        remedy="leave it out, and convert the checkpoint to safetensors",
    ),
    _refused("--state_dict", options.text(), "weights are read from the checkpoint's own files"),
    # Variables.
    foreign_options.honoured(
        "DEBUG_MODE", "log_level", kind=options.text(), note="`true` logs debug lines; anything else changes nothing."
    ),
    foreign_options.honoured(
        "LOCAL_RANK",
        "port",
        kind=options.whole(0, LAST_RANK),
        note=f"The port is {FIRST_PORT} and this number.",
        default=0,
    ),
)
