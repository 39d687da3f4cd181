//go:build cloudkms

package main

// Keys in Google Cloud KMS.
import _ "go.step.sm/crypto/kms/cloudkms"
