"""The formats of other tools, one file each. None imports the tool whose format it writes."""
