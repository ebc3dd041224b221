"""Step caching (TeaCache): leave out steps whose velocity the steps before it tell, outside of the graph."""
