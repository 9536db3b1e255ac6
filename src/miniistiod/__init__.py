"""A small identity authority and control plane for ambient meshes without Kubernetes."""
