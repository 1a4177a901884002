//! Loads the programs and keeps their maps.
