"""`treetune plan`: what a run would take, from its config alone."""
