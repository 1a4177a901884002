//! Tests with real counterparts.
