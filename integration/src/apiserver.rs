//! A stand-in for a Kubernetes API server, as strict as the real one where Holdfast touches it.
