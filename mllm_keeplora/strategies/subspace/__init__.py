"""Methods that choose the directions an update may take."""
