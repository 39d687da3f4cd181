//go:build azurekms

package main

// Keys in Azure Key Vault.
import _ "go.step.sm/crypto/kms/azurekms"
