"""The other sides of the comparisons: libraries as they are shipped, and the published path built anew from its description."""
