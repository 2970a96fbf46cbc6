"""Does every formula of the moment theory hold in simulation? See README.md."""
