"""Another network beside the frozen one, which answers for it or steers its answer."""
