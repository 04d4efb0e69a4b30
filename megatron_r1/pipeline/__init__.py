"""Stages joined into runs. A run owns its folder; a stage owns its loop."""
