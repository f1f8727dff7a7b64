{{- define "gyrfalcon.name" -}}
{{ default .Release.Name .Values.nameOverride }}
{{- end -}}

{{- define "gyrfalcon.labels" -}}
app.kubernetes.io/name: gyrfalcon
app.kubernetes.io/instance: {{ include "gyrfalcon.name" . }}
{{- end -}}

{{- define "gyrfalcon.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop:
    - ALL
{{- end -}}

{{- define "gyrfalcon.behavior" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - type: Pods
      value: 2
      periodSeconds: 60
scaleDown:
  stabilizationWindowSeconds: 600
  policies:
    - type: Pods
      value: 1
      periodSeconds: 120
{{- end -}}
