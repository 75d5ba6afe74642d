"""The painter of generated scenes."""
