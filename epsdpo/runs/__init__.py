"""How a run lies on disk: its folders, its manifests, and what a stage's result depends on."""
