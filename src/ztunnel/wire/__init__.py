"""Messages of the certificate authority and of discovery.

The `*_pb2` modules are made from the `.proto` files beside them by `make proto` and are checked in.
Packages, names and numbers are those of Istio and Envoy, so that any mesh peer reads them; only the
fields that have a meaning here are named, and protobuf keeps the others untouched.
"""
