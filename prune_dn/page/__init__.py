"""The page of a cut: connections, charts and tables as one HTML file that asks nobody for anything."""
