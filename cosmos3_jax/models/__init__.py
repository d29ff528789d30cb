"""The networks: layers, the two towers of the transformer, the video VAE. They know no path and no prompt."""
