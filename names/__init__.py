"""How things are found by name: losses, tunings, metrics, data sets, backbone families; and what was meant."""
