//! The API: one file per resource.
pub mod types;
