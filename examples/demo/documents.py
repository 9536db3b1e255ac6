"""What the operator of the demo's mesh wrote: two workloads, a service, and who may call it."""

from __future__ import annotations

__all__ = ["ADMIN_PORT", "DENY_TCP_TOO", "DOCUMENTS", "HTTP_PORT", "SERVICE", "TCP_PORT", "VIP"]

HTTP_PORT, TCP_PORT, ADMIN_PORT = 8080, 9000, 9100
SERVICE = "orders.shop.mesh"
VIP = "10.96.0.10"

_WORKLOADS = """\
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: frontend, namespace: shop, labels: {app: frontend}}
spec: {address: "{alpha}", serviceAccount: frontend}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: orders, namespace: shop, labels: {app: orders}}
spec: {address: "{beta}", serviceAccount: orders}
"""

_SERVICE = f"""\
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: orders, namespace: shop}}
spec:
  hosts: [{SERVICE}]
  addresses: [{VIP}]
  location: MESH_INTERNAL
  resolution: STATIC
  ports:
  - {{number: 80, name: http, protocol: HTTP, targetPort: {HTTP_PORT}}}
  - {{number: {TCP_PORT}, name: tcp, protocol: TCP}}
  - {{number: {ADMIN_PORT}, name: admin, protocol: TCP}}
  workloadSelector: {{labels: {{app: orders}}}}
"""

_POLICIES = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: orders-clients, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/frontend]}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: orders-closed-ports, namespace: shop}
spec:
  selector: {matchLabels: {app: orders}}
  action: DENY
  rules:
  - to: [{operation: {ports: [PORTS]}}]
"""


def _policies(*ports: int) -> str:
    return _POLICIES.replace("PORTS", ", ".join(f'"{port}"' for port in ports))


DOCUMENTS = {"workloads": _WORKLOADS, "service": _SERVICE, "policies": _policies(ADMIN_PORT)}
DENY_TCP_TOO = _policies(ADMIN_PORT, TCP_PORT)
