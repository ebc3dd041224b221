"""What runs a graph or an engine: arrays of any library, a CPU or a card, and what is refused before either."""
