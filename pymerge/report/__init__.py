"""Pages and pictures of what a merge did: one HTML file that needs no network, and figures for papers."""
