//! Tests of the virtual configuration space against a model of a device.
