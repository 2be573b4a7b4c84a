"""Small modules that merged models need when they are used."""
