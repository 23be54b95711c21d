"""The methods: tensors in, tensors out. Nothing here knows of files, models, devices or the command line."""
