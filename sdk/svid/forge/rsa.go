// RSA keys of any length and exponent, in no time, for what has to be refused: a
// modulus of many small primes keeps nothing secret, but what its key signs
// verifies like any other signature. So a test can show that it was the key that
// was refused, and not a bad proof of its possession.

package forge

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"slices"
)

const minPrimeBits, maxPrimeBits = 32, 64

// RSAKey is an RSA key that nobody should accept. It implements crypto.Signer,
// with SHA-256 and PKCS #1 v1.5 only.
type RSAKey struct {
	public rsa.PublicKey
	d      *big.Int
	primes []*big.Int
}

// NewRSAKey makes a key of exactly bits bits with the public exponent e, an odd
// number of 3 or more.
func NewRSAKey(t TB, bits, e int) *RSAKey {
	t.Helper()
	k := &RSAKey{public: rsa.PublicKey{N: big.NewInt(1), E: e}}
	phi := big.NewInt(1)
	for left := bits; left > 0; left = bits - k.public.N.BitLen() {
		p := k.nextPrime(t, primeBits(left))
		n := new(big.Int).Mul(k.public.N, p)
		if over := n.BitLen() - bits; over > 0 || over < 0 && over > -minPrimeBits {
			continue // nothing could fill the rest
		}
		k.public.N, k.primes = n, append(k.primes, p)
		phi.Mul(phi, new(big.Int).Sub(p, big.NewInt(1)))
	}
	k.d = new(big.Int).ModInverse(big.NewInt(int64(e)), phi)
	return k
}

// primeBits is the length of the next prime where left bits are missing. The
// product of two numbers has as many bits as both, or one less.
func primeBits(left int) int {
	switch {
	case left <= maxPrimeBits:
		return left + mathrand.IntN(2) //nolint:gosec // nothing here is secret
	case left < 2*maxPrimeBits:
		return left / 2
	}
	return maxPrimeBits
}

// nextPrime is one that is not there yet and leaves e invertible.
func (k *RSAKey) nextPrime(t TB, bits int) *big.Int {
	t.Helper()
	one := big.NewInt(1)
	for {
		p, err := rand.Prime(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		gcd := new(big.Int).GCD(nil, nil, big.NewInt(int64(k.public.E)), new(big.Int).Sub(p, one))
		if gcd.Cmp(one) == 0 && !slices.ContainsFunc(k.primes, func(q *big.Int) bool { return q.Cmp(p) == 0 }) {
			return p
		}
	}
}

// Public implements crypto.Signer.
func (k *RSAKey) Public() crypto.PublicKey { return &k.public }

// Sign implements crypto.Signer: RSASSA-PKCS1-v1_5 (RFC 8017 §8.2.1), by the
// Chinese remainder theorem.
func (k *RSAKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 {
		return nil, errors.New("sign: this key signs SHA-256 only")
	}
	// DigestInfo of SHA-256, RFC 8017 §9.2.
	info := append([]byte{0x30, 0x31, 0x30, 0x0d, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1, 5, 0, 4, 0x20}, digest...)
	size := k.public.Size()
	padded := append([]byte{0, 1}, slices.Repeat([]byte{0xff}, size-3-len(info))...)
	message := new(big.Int).SetBytes(append(append(padded, 0), info...))
	sum := new(big.Int)
	for _, p := range k.primes {
		rest := new(big.Int).Div(k.public.N, p)
		share := new(big.Int).Exp(message, k.d, p)
		share.Mul(share, rest).Mul(share, new(big.Int).ModInverse(rest, p))
		sum.Add(sum, share)
	}
	return sum.Mod(sum, k.public.N).FillBytes(make([]byte, size)), nil
}
