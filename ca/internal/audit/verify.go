// Reading all of a log for an auditor: the chain from its first record to its
// last, each line against the leaf that the signed tree has for it, and that
// nothing is missing but what retention says it dropped. It needs the log's
// folder and no CA.

package audit

import (
	"bufio"
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"merlon.dev/ca/internal/merkle"
	"merlon.dev/sdk/checkpoint"
)

// BadRecordError names the first record that breaks the chain.
type BadRecordError struct {
	File   string
	Line   int    // from 1
	Seq    uint64 // as the record says; 0 if it says none
	Reason string
}

func (e *BadRecordError) Error() string {
	return fmt.Sprintf("%s: audit log line %d (seq %d): %s", e.File, e.Line, e.Seq, e.Reason)
}

// Report says what is good in a log.
type Report struct {
	// First and Last are the records that are there and good; 0 for none. Those
	// before First were dropped by retention.
	First, Last uint64
	// Checkpoint is the last one that the log was saved with; those after its
	// size are in the chain and not under it yet. Its zero value: there is none.
	Checkpoint checkpoint.Checkpoint
	// Key signed it, and RootHash, the SHA-256 in hex of the public key of the
	// root that vouches for the key, is to be compared with the known one.
	Key      checkpoint.Key
	RootHash string
	// Unfinished are the administrative acts that the log holds the beginning of,
	// and no outcome: what the CA was at when it was killed, or is at now. Whether
	// they were done, the log cannot say.
	Unfinished []Unfinished
}

// Unfinished is the beginning of an act.
type Unfinished struct {
	Seq                uint64
	Time               time.Time
	Actor, Detail, Act string
}

// Verify walks the whole log at path. The report says how far it is good; the
// error is a *BadRecordError, or says what else is wrong. A log that a CA has
// open may end in a line still being written.
func Verify(path string) (Report, error) {
	signed, report, err := LastCheckpoint(path)
	if err != nil {
		return report, err
	}
	v := &verifier{report: report}
	if signed != nil {
		v.tree = merkle.Verified(treeDir(path), report.Checkpoint.Size, report.Checkpoint.Root)
	}
	v.begun = make(map[string]Unfinished)
	err = v.files(path)
	v.report.Unfinished = slices.SortedFunc(maps.Values(v.begun), func(a, b Unfinished) int { return cmp.Compare(a.Seq, b.Seq) })
	if err == nil {
		err = v.ending()
	}
	return v.report, err
}

// verifier is one walk.
type verifier struct {
	report  Report
	tree    tlog.HashReader // of the checkpoint; nil without one
	leaves  []tlog.Hash     // of one tile, from leaf begin on
	begin   int64
	dropped uint64 // what retention says
	begun   map[string]Unfinished
	end     link
}

func (v *verifier) files(path string) error {
	segments, err := rotated(path)
	if err != nil {
		return err
	}
	for i, s := range append(segments, segment{path: path}) {
		file, err := os.Open(s.path)
		if err != nil {
			return fmt.Errorf("verify audit log: %w", err)
		}
		if i == 0 {
			err = v.start(file)
		}
		if err == nil {
			_, v.end, err = walk(file, v.end, v.record)
		}
		file.Close()
		if bad, ok := errors.AsType[*BadRecordError](err); ok {
			bad.File = s.path
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// start takes the first record that is there as the beginning, where the tree
// can say whether it is right.
func (v *verifier) start(file *os.File) error {
	first, err := firstOf(file)
	if err == nil && first != nil && first.Seq > 1 && first.Seq <= uint64(v.report.Checkpoint.Size) {
		v.end = first.own()
	}
	return nil // what is wrong with it, the walk says
}

// record compares a line with its leaf.
func (v *verifier) record(h header, line []byte) error {
	if v.report.First == 0 {
		v.report.First = h.Seq
	}
	if h.CheckpointSize > uint64(v.report.Checkpoint.Size) {
		return h.uncounted(v.report.Checkpoint.Size)
	}
	if index := int64(h.Seq) - 1; index < v.report.Checkpoint.Size {
		leaf, err := v.leaf(index)
		if err != nil {
			return badError(fmt.Sprintf("the tree that the checkpoint signs is damaged: %v", err))
		}
		if leaf != tlog.RecordHash(line) {
			return badError("it is not the record that the checkpoint counts")
		}
		v.dropped = max(v.dropped, h.DroppedThrough) // nobody vouches for what is beyond the checkpoint
	}
	v.report.Last = h.Seq
	v.follow(h)
	return nil
}

// follow keeps what of the acts has begun and not ended.
func (v *verifier) follow(h header) {
	switch {
	case h.Act == "":
	case !h.Pending:
		delete(v.begun, h.Act)
	case v.begun[h.Act].Seq == 0: // its beginning, not one of its parts
		v.begun[h.Act] = Unfinished{h.Seq, h.Time, h.Actor, h.Detail, h.Act}
	}
}

// leaf reads the leaves of a whole tile at once.
func (v *verifier) leaf(index int64) (tlog.Hash, error) {
	if i := index - v.begin; i >= 0 && i < int64(len(v.leaves)) {
		return v.leaves[i], nil
	}
	v.begin = index - index%merkle.TileWidth
	var indexes []int64
	for i := v.begin; i < min(v.begin+merkle.TileWidth, v.report.Checkpoint.Size); i++ {
		indexes = append(indexes, tlog.StoredHashIndex(0, i))
	}
	var err error
	if v.leaves, err = v.tree.ReadHashes(indexes); err != nil {
		return tlog.Hash{}, err
	}
	return v.leaves[index-v.begin], nil
}

// ending says what is missing at either end.
func (v *verifier) ending() error {
	r := v.report
	if r.Last < uint64(r.Checkpoint.Size) {
		return fmt.Errorf("the audit log ends with record %d, and its checkpoint counts %d: records that were acknowledged are missing", r.Last, r.Checkpoint.Size)
	}
	if r.First > 1 && v.dropped < r.First-1 {
		return fmt.Errorf("the audit log begins with record %d, and no record under its checkpoint says that retention dropped more than those to %d: records are missing", r.First, v.dropped)
	}
	return nil
}

// walk follows the chain from before on as far as it is good, and calls record
// for each.
func walk(r io.Reader, before link, record func(header, []byte) error) (n int, end link, err error) {
	lines := bufio.NewReaderSize(r, maxLine)
	for end = before; ; n++ {
		line, err := lines.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF) && len(line) == 0:
			return n, end, nil
		case errors.Is(err, io.EOF):
			return n, end, &BadRecordError{Line: n + 1, Reason: "cut short: never acknowledged, or still being written"}
		case errors.Is(err, bufio.ErrBufferFull):
			return n, end, &BadRecordError{Line: n + 1, Reason: "longer than any record"}
		case err != nil:
			return n, end, fmt.Errorf("verify audit log: %w", err)
		}
		h, own, err := parseLine(line[:len(line)-1])
		if err == nil {
			err = h.follows(end)
		}
		if err == nil {
			err = record(h, line[:len(line)-1])
		}
		if err != nil {
			return n, end, &BadRecordError{Line: n + 1, Seq: h.Seq, Reason: err.Error()}
		}
		end = own
	}
}

// LastCheckpoint reads the checkpoint that the log at path was saved with, and
// verifies that the key which signed it was certified under the root that lies
// beside it. Whether that is the right root is for the caller to know. A log
// without a checkpoint has signed nil.
func LastCheckpoint(path string) (signed []byte, r Report, err error) {
	dir := treeDir(path)
	signed, err = os.ReadFile(filepath.Join(dir, checkpointFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, r, nil
	}
	if err != nil {
		return nil, r, fmt.Errorf("read the checkpoint: %w", err)
	}
	chain, err := readChain(filepath.Join(dir, chainFile))
	if err != nil {
		return nil, r, err
	}
	last, err := checkpoint.Unverified(signed)
	if err != nil {
		return nil, r, err
	}
	if r.Key, r.RootHash, err = keyFrom(chain, last); err == nil {
		r.Checkpoint, err = r.Key.Open(signed)
	}
	if err != nil {
		return nil, r, fmt.Errorf("%s: %w", dir, err)
	}
	return signed, r, nil
}

// keyFrom returns the key that the chain, with its root, vouches for. It may
// have ended since: what it signed stays signed.
func keyFrom(chain [][]byte, of checkpoint.Checkpoint) (key checkpoint.Key, rootHash string, err error) {
	if len(chain) < 3 {
		return key, "", errors.New("the certificate of the log's key is missing, or one above it")
	}
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		if certs[i], err = x509.ParseCertificate(der); err != nil {
			return key, "", err
		}
	}
	cert, root := certs[0], certs[len(certs)-1]
	sum := sha256.Sum256(root.RawSubjectPublicKeyInfo)
	td, err := trustDomainOf(certs[1])
	if err != nil {
		return key, "", err
	}
	key, err = checkpoint.VerifyChain(chain[:len(chain)-1], []*x509.Certificate{root}, td, cert.NotBefore)
	if err == nil && key.Origin() != of.Origin {
		err = fmt.Errorf("the checkpoint is of %.200q, and the certificate of the key of %s", of.Origin, key.Origin())
	}
	return key, hex.EncodeToString(sum[:]), err
}

// trustDomainOf is the one that an issuing certificate is for; the root may be
// that of a larger PKI.
func trustDomainOf(issuer *x509.Certificate) (string, error) {
	if len(issuer.URIs) != 1 || issuer.URIs[0].Scheme != "spiffe" {
		return "", errors.New("the issuing certificate does not carry the SPIFFE ID of a trust domain")
	}
	return issuer.URIs[0].Host, nil
}

func readChain(path string) (chain [][]byte, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the certificate of the log's key: %w", err)
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		chain = append(chain, block.Bytes)
	}
	return chain, nil
}
