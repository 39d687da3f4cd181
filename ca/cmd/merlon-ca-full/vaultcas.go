//go:build vaultcas

package main

// Vault's PKI engine as upstream authority.
import _ "github.com/smallstep/certificates/cas/vaultcas"
