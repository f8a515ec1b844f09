"""The parts of `jaxft.generate`: how tokens are drawn, the device's programs, and text."""
