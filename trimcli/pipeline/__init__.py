"""Hidden states through the layers, one resident: statistics, the passes that choose masks, and the plan of it all."""
