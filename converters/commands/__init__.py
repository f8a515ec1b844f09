"""The commands of `jaxft-convert`, each a dataclass whose fields are its arguments; `converters.cli` lists them."""
