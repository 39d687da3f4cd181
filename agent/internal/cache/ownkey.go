// X509-SVIDs for keys that the workload holds. They have slots like all others,
// each of one stream, and so are renewed, replaced and withdrawn like all others;
// but where the agent would make a key it asks the workload for a CSR.

package cache

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/agent/internal/workload"
)

const (
	maxCSRBytes = 8 << 10
	// maxKeyBytes bounds an encoded public key: RSA of 3072 bits takes 422.
	maxKeyBytes = 512
)

// What is wrong with a CSR, beside what the CA says.
var (
	ErrNotOwn    = errors.New("no registration entry lets the caller hold a key for this identity")
	ErrNotWanted = errors.New("no CSR is wanted now: wait for csr_wanted")
)

// OwnKey is one identity of a workload that holds keys itself.
type OwnKey struct {
	Entry *Entry
	// SVID is the newest; nil for none. Its Key is nil.
	SVID *SVID
	// Wanted asks for a CSR, each time by another number; 0: none is wanted. Refusal
	// says why the last one came to nothing.
	Wanted  uint64
	Refusal string
}

// OwnKeys is View for a workload that holds keys itself: its identities in order,
// each SPIFFE ID once. Those that the agent alone makes keys for have neither SVID
// nor Wanted.
func (s *Subscription) OwnKeys(proof workload.Proof) (View, []OwnKey) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	v := s.look(proof)
	used := make(map[slotKey]*slot, len(v.Entries))
	at := make(map[spiffeid.ID]int, len(v.Entries))
	var keys []OwnKey
	for _, e := range v.Entries {
		i, seen := at[e.SPIFFEID]
		if !seen {
			i = len(keys)
			at[e.SPIFFEID] = i
			keys = append(keys, OwnKey{Entry: e})
		}
		if !e.OwnKey || keys[i].Entry.OwnKey && seen {
			continue
		}
		sl := s.use(e, s, used)
		keys[i] = OwnKey{Entry: e, SVID: sl.svid, Refusal: sl.refusal}
		if sl.asked {
			keys[i].Wanted = sl.wishes
		}
	}
	s.release(used)
	s.slots = used
	return v, keys
}

// Submit sends the CSR for an identity that OwnKeys wanted one for to the CA. What
// comes of it is in a later OwnKeys. CSRKey has judged the CSR.
func (s *Subscription) Submit(id spiffeid.ID, csr []byte, public publicKey) error {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, sl := range s.slots {
		if sl.key.holder != s || sl.entry.SPIFFEID != id {
			continue
		}
		if !sl.asked {
			return ErrNotWanted
		}
		sl.asked, sl.csr, sl.public = false, csr, public
		c.order(sl)
		return nil
	}
	return ErrNotOwn
}

// CSRKey returns the public key of a CSR. The CA judges the CSR; here it is only
// kept from costing much: its size is looked at before it is parsed, and that of
// its key before anything is computed with it.
func CSRKey(der []byte) (publicKey, error) {
	if len(der) > maxCSRBytes {
		return nil, fmt.Errorf("csr: %d bytes; at most %d", len(der), maxCSRBytes)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, errors.New("csr: it does not parse as PKCS#10")
	}
	if n := len(csr.RawSubjectPublicKeyInfo); n > maxKeyBytes {
		return nil, fmt.Errorf("csr: a public key of %d bytes; at most %d", n, maxKeyBytes)
	}
	switch key := csr.PublicKey.(type) {
	case *ecdsa.PublicKey:
		return key, nil
	case *rsa.PublicKey:
		return key, nil
	default:
		return nil, errors.New("csr: the key is neither ECDSA nor RSA")
	}
}

// refusalFor is what a workload may know of why it got no SVID: everything about
// its own CSR, nothing else.
func refusalFor(err error) string {
	if status.Code(err) == codes.InvalidArgument {
		return status.Convert(err).Message()
	}
	return "the CA did not issue the X509-SVID; the agent's log says why"
}
