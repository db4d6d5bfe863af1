"""Parameter trees: the names of their leaves, quantised leaves, and how trees and tables are shown."""
