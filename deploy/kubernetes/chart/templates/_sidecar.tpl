{{- /* Generated from component/sidecar.yaml by deploy/kubernetes/generate. */}}
{{- define "lakebase-proxy.container" -}}
- name: lakebase-proxy
  image: {{ .Values.image | toJson }}
  restartPolicy: Always
  args: {{ .Values.args | toJson }}
  envFrom:
    - configMapRef:
        name: lakebase-proxy
  env:
    - name: DATABRICKS_AUTH_TYPE
      value: file-oidc
    - name: DATABRICKS_OIDC_TOKEN_FILEPATH
      value: /var/run/secrets/databricks/token
  ports:
    - name: lakebase-http
      containerPort: 9090
  startupProbe:
    httpGet:
      path: /startup
      port: lakebase-http
    periodSeconds: 1
    failureThreshold: 60
  readinessProbe:
    httpGet:
      path: /readiness
      port: lakebase-http
    periodSeconds: 10
  livenessProbe:
    httpGet:
      path: /liveness
      port: lakebase-http
    periodSeconds: 20
    timeoutSeconds: 5
  resources:
    requests: {{ .Values.resources.requests | toJson }}
    limits: {{ .Values.resources.limits | toJson }}
  securityContext:
    runAsNonRoot: true
    seccompProfile:
      type: RuntimeDefault
    runAsUser: 65532
    runAsGroup: 65532
    readOnlyRootFilesystem: true
    allowPrivilegeEscalation: false
    capabilities:
      drop:
        - ALL
  volumeMounts:
    - name: databricks-token
      mountPath: /var/run/secrets/databricks
      readOnly: true
{{- end }}
{{- /* Generated from component/sidecar.yaml by deploy/kubernetes/generate. */}}
{{- define "lakebase-proxy.volume" -}}
- name: databricks-token
  projected:
    sources:
      - serviceAccountToken:
          path: token
          audience: {{ .Values.audience | toJson }}
          expirationSeconds: 3600
{{- end }}
