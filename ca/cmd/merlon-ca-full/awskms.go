//go:build awskms

package main

// Keys in AWS KMS.
import _ "go.step.sm/crypto/kms/awskms"
