// What a sealed key file is: a private key, sealed (sdk/seal) as of its kind, its
// generation and its trust domain, in PEM, so that no file passes for another.

package upstream

import (
	"bytes"
	"encoding/pem"
	"fmt"
	"strconv"

	"merlon.dev/sdk/durable"
	"merlon.dev/sdk/seal"
)

const (
	sealedFile = "key.sealed"
	sealedType = "MERLON SEALED KEY"
)

// seat is the one place where a sealed key is of use.
type seat struct {
	trustDomain string
	kind        kind
	number      int
}

// as is what the private key in a seat is sealed as.
func (at seat) as() []string {
	return []string{"merlon sealed key", at.trustDomain, string(at.kind), strconv.Itoa(at.number)}
}

// sealKey seals the PKCS #8 private key for its seat.
func sealKey(kek *seal.Key, private []byte, at seat) ([]byte, error) {
	sealed, err := kek.Seal(private, at.as()...)
	if err != nil {
		return nil, err
	}
	return encodeSealed(sealed), nil
}

func encodeSealed(sealed []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: sealedType, Bytes: sealed})
}

// openKey is the reverse of sealKey.
func openKey(kek *seal.Key, text []byte, at seat) ([]byte, error) {
	sealed, err := decodeSealed(text)
	if err != nil {
		return nil, err
	}
	return kek.Open(sealed, at.as()...)
}

// decodeSealed takes what encodeSealed writes and nothing else.
func decodeSealed(text []byte) ([]byte, error) {
	block, _ := pem.Decode(text)
	if block == nil || block.Type != sealedType {
		return nil, fmt.Errorf("%w: not one %s in PEM", seal.ErrBroken, sealedType)
	}
	if !bytes.Equal(encodeSealed(block.Bytes), text) {
		return nil, fmt.Errorf("%w: there is more in the file than a sealed key", seal.ErrBroken)
	}
	return block.Bytes, nil
}

func readPrivate(path string) ([]byte, error) {
	text, err := durable.ReadGuarded(path, 0o600, maxPEM)
	if err != nil {
		return nil, fmt.Errorf("read a key file: %w", err)
	}
	return text, nil
}
