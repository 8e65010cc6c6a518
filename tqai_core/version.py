"""The version of the package, in a file that every module may import."""

VERSION = "0.1.0"
