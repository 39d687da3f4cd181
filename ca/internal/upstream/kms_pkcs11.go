//go:build pkcs11

package upstream

// PKCS #11 tokens, through their C module.
import _ "go.step.sm/crypto/kms/pkcs11"
