//! vmtwin-ring
