"""Admin: how depth amplifies a small change of the weights, and whether 18 + 18 Post-LN layers learn to translate."""
