// Package checkpoint is what a log says about itself and how others hold it to
// that: a signed statement of its size and root hash (C2SP tlog-checkpoint, in
// a C2SP signed note), the certificate by which a CA vouches for the key that
// signs it, and the proof that a later statement goes on from an earlier one.
package checkpoint

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// MaxBytes is the longest signed checkpoint that is read.
const MaxBytes = 4 << 10

// Checkpoint is the state of a log.
type Checkpoint struct {
	Origin string // names the log
	Size   int64  // how many entries it has
	Root   tlog.Hash
}

// Key is the key of one log of one replica of a CA. Its zero value verifies
// nothing.
type Key struct {
	TrustDomain string
	Replica     string
	Public      ed25519.PublicKey
}

// Origin names the log that the key signs for: another key makes another log.
func (k Key) Origin() string {
	sum := sha256.Sum256(k.Public)
	return fmt.Sprintf("%s/log/%s/%x", k.TrustDomain, k.Replica, sum[:4])
}

// Sign states, under the key's origin, that the log has size entries and this
// root hash. The signer holds k.Public.
func (k Key) Sign(size int64, root tlog.Hash, signer crypto.Signer) ([]byte, error) {
	verifier, err := k.verifier()
	if err != nil {
		return nil, err
	}
	c := Checkpoint{Origin: k.Origin(), Size: size, Root: root}
	signed, err := note.Sign(&note.Note{Text: c.text()}, noteSigner{verifier, signer})
	if err != nil {
		return nil, fmt.Errorf("sign a checkpoint: %w", err)
	}
	if _, err := k.Open(signed); err != nil {
		return nil, fmt.Errorf("sign a checkpoint: the signer gave a wrong signature: %w", err)
	}
	return signed, nil
}

// Open returns the checkpoint in a note that k has signed.
func (k Key) Open(signed []byte) (Checkpoint, error) {
	if len(signed) > MaxBytes {
		return Checkpoint{}, fmt.Errorf("read a checkpoint: it has more than %d bytes", MaxBytes)
	}
	verifier, err := k.verifier()
	if err != nil {
		return Checkpoint{}, err
	}
	n, err := note.Open(signed, note.VerifierList(verifier))
	if err != nil {
		return Checkpoint{}, fmt.Errorf("read a checkpoint of %s: %w", k.Origin(), err)
	}
	c, err := parse(n.Text)
	if err == nil && c.Origin != k.Origin() {
		err = fmt.Errorf("read a checkpoint of %s: it is of %.200q", k.Origin(), c.Origin)
	}
	return c, err
}

// Unverified returns what a note says, whoever signed it.
func Unverified(signed []byte) (Checkpoint, error) {
	text, _, ok := bytes.Cut(signed, []byte("\n\n"))
	if !ok || len(signed) > MaxBytes {
		return Checkpoint{}, errors.New("read a checkpoint: it is no signed note")
	}
	return parse(string(text) + "\n")
}

func (c Checkpoint) text() string {
	return fmt.Sprintf("%s\n%d\n%s\n", c.Origin, c.Size, base64.StdEncoding.EncodeToString(c.Root[:]))
}

// parse takes what text writes, and nothing else: extension lines, which others
// may write, are none of ours.
func parse(text string) (Checkpoint, error) {
	lines := strings.Split(text, "\n")
	if len(lines) != 4 || lines[0] == "" || lines[3] != "" {
		return Checkpoint{}, errors.New("read a checkpoint: it does not have three lines")
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil || size < 0 || size > maxSize || strconv.FormatInt(size, 10) != lines[1] {
		return Checkpoint{}, fmt.Errorf("read a checkpoint: %.40q is no size of a tree", lines[1])
	}
	root, err := base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil || len(root) != tlog.HashSize {
		return Checkpoint{}, fmt.Errorf("read a checkpoint: %.80q is no root hash", lines[2])
	}
	c := Checkpoint{Origin: lines[0], Size: size, Root: tlog.Hash(root)}
	if c.text() != text { // the decoder passes over a carriage return
		return Checkpoint{}, fmt.Errorf("read a checkpoint: %.80q is no root hash", lines[2])
	}
	return c, nil
}

// maxSize keeps the numbers of hashes, twice as many as leaves, in 63 bits.
const maxSize = 1 << 61

// ErrFork reports two checkpoints of one log of which neither goes on from the
// other: entries were taken back, or others shown to others.
var ErrFork = errors.New("the log was forked or put back")

// Follows checks that the log of c goes on from the one of before, by the proof
// of it. The error is ErrFork unless they are of different logs.
func (c Checkpoint) Follows(before Checkpoint, proof []tlog.Hash) error {
	switch {
	case before.Origin != c.Origin:
		return fmt.Errorf("compare checkpoints: they are of %q and %q", before.Origin, c.Origin)
	case before.Size > c.Size:
		return fmt.Errorf("%w: it had %d entries and has %d", ErrFork, before.Size, c.Size)
	case before.Size == 0:
		return nil
	case before.Size == c.Size && before.Root == c.Root:
		return nil
	case before.Size == c.Size:
		return fmt.Errorf("%w: it shows other entries than before among the first %d", ErrFork, c.Size)
	}
	if err := tlog.CheckTree(proof, c.Size, c.Root, before.Size, before.Root); err != nil {
		return fmt.Errorf("%w: nothing proves that its %d entries begin with the %d before: %v", ErrFork, c.Size, before.Size, err)
	}
	return nil
}

// Holds checks the proof that the log of c holds entry at index.
func (c Checkpoint) Holds(entry []byte, index int64, proof []tlog.Hash) error {
	if index < 0 || index >= c.Size {
		return fmt.Errorf("the log has %d entries, and none with index %d", c.Size, index)
	}
	if err := tlog.CheckRecord(proof, c.Size, c.Root, index, tlog.RecordHash(entry)); err != nil {
		return fmt.Errorf("nothing proves that entry %d of the log is this one: %w", index, err)
	}
	return nil
}

// VerifierKey is the key in the form that tools for signed notes take.
func (k Key) VerifierKey() (string, error) {
	if len(k.Public) != ed25519.PublicKeySize {
		return "", errors.New("the key of a log is an Ed25519 key")
	}
	return note.NewEd25519VerifierKey(k.Origin(), k.Public)
}

func (k Key) verifier() (note.Verifier, error) {
	text, err := k.VerifierKey()
	if err != nil {
		return nil, err
	}
	verifier, err := note.NewVerifier(text)
	if err != nil {
		return nil, fmt.Errorf("use the key of %s: %w", k.Origin(), err)
	}
	return verifier, nil
}

type noteSigner struct {
	note.Verifier
	signer crypto.Signer
}

// Sign implements note.Signer.
func (s noteSigner) Sign(msg []byte) ([]byte, error) {
	return s.signer.Sign(rand.Reader, msg, crypto.Hash(0))
}
