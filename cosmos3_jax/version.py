"""Which version of this project runs."""

VERSION = "0.1.0"
