//! vmtwin-frontend
