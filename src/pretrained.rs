//! pretrained
