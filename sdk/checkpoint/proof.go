// Proofs as they travel.

package checkpoint

import (
	"encoding/base64"
	"fmt"
	"strings"

	"golang.org/x/mod/sumdb/tlog"
)

// HashesToBytes is for messages.
func HashesToBytes(hashes []tlog.Hash) [][]byte {
	out := make([][]byte, len(hashes))
	for i := range hashes {
		out[i] = hashes[i][:]
	}
	return out
}

// HashesFromBytes reads what HashesToBytes made.
func HashesFromBytes(in [][]byte) ([]tlog.Hash, error) {
	hashes := make([]tlog.Hash, len(in))
	for i, b := range in {
		if len(b) != tlog.HashSize {
			return nil, fmt.Errorf("hash %d of a proof has %d bytes instead of %d", i, len(b), tlog.HashSize)
		}
		hashes[i] = tlog.Hash(b)
	}
	return hashes, nil
}

// FormatProof writes the proof that the log of a signed checkpoint holds the
// entry with this index as a file of its own, C2SP tlog-proof.
func FormatProof(index int64, hashes []tlog.Hash, signed []byte) string {
	var b strings.Builder
	fmt.Fprintf(&b, "c2sp.org/tlog-proof@v1\nindex %d\n", index)
	for _, h := range hashes {
		b.WriteString(base64.StdEncoding.EncodeToString(h[:]) + "\n")
	}
	fmt.Fprintf(&b, "\n%s", signed)
	return b.String()
}
