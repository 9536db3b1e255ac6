"""The node proxy of an ambient mesh, as a daemon or inside a program."""
