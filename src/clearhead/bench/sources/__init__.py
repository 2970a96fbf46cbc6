"""One file for each source of competitors; see `clearhead.bench.prepared`."""
