// Keys on disk. A generation is a folder KIND-NUMBER with key.sealed (seal.go)
// and, but for the JWT key, cert.pem; of its root a replica has the certificate
// alone, as "anchor". It is written under another name, synced, and renamed: a
// crash leaves all of it or nothing that counts, and two processes cannot make the
// same generation. Keys in clear, as key.pem, are of an older merlon-ca: they are
// sealed on sight (sealclear.go).

package upstream

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	kmsapi "go.step.sm/crypto/kms/apiv1"

	"merlon.dev/sdk/durable"
	"merlon.dev/sdk/seal"
)

type kind string

const (
	kindRoot         kind = "root"
	kindIntermediate kind = "intermediate"
	kindJWT          kind = "jwt"
	kindPolicy       kind = "policy"
	kindLog          kind = "log"
	kindAnchor       kind = "anchor"
)

const (
	certFile = "cert.pem"
	// chainFile holds what is above the certificate, the root last.
	chainFile = "chain.pem"
	// Unfinished generations begin with a dot, which no kind does.
	unfinished = ".new-"
	maxPEM     = 64 << 10
	maxSecret  = 1 << 10 // of a password or PIN
)

// generation is one key with its certificate.
type generation struct {
	kind   kind
	number int
	signer crypto.Signer     // nil for an anchor
	cert   *x509.Certificate // nil for jwt and log, and for policy until it is certified
	// chain is what is above an intermediate that an upstream authority signed, the
	// root last; empty where our own root did.
	chain []*x509.Certificate
}

// madeKey is a key that was just made and is not put away yet: a private one, to
// be sealed, or the name of one in the KMS.
type madeKey struct {
	signer  crypto.Signer
	private crypto.PrivateKey
	uri     string
}

// keyDir is the folder. It is not safe for concurrent use.
type keyDir struct {
	path        string
	trustDomain string
	keys        kmsapi.KeyManager
	rs256       bool     // JWT keys are made for RS256
	kms         *outside // nil: all keys are files
	source      seal.Source
	kek         *seal.Key // nil until it is needed
	log         *slog.Logger
	numbers     map[kind][]int // generations that are there, ascending
}

// openKeyDir makes the folder when it is missing, removes what a crash left
// unfinished, and seals what lies in clear.
func openKeyDir(ctx context.Context, cfg Config, keys kmsapi.KeyManager) (*keyDir, error) {
	kms, err := openKMS(ctx, cfg.KMS)
	if err != nil {
		return nil, err
	}
	d := &keyDir{
		path: cfg.Dir, trustDomain: cfg.TrustDomain.Name(), keys: keys, kms: kms, rs256: cfg.JWTAlgorithm == RS256,
		source: cfg.KEK, log: cfg.Logger, numbers: make(map[kind][]int),
	}
	if err = d.list(); err == nil {
		err = d.sealClear(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, d.kms.close())
	}
	return d, nil
}

// list makes the folder, or looks what is in it.
func (d *keyDir) list() error {
	path := d.path
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	if err := durable.CheckMode(path, fs.ModeDir, 0o700); err != nil {
		return err
	}
	if err := durable.SyncDir(filepath.Dir(path)); err != nil { // or a crash takes the new folder away
		return err
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), unfinished) {
			if err := removeUnfinished(path, entry.Name()); err != nil {
				return fmt.Errorf("remove an unfinished key: %w", err)
			}
			continue
		}
		what, number, ok := parseGeneration(entry.Name())
		if !ok {
			return fmt.Errorf("%s does not belong here; move it elsewhere", filepath.Join(path, entry.Name()))
		}
		if err := durable.RemoveUnfinished(d.folder(what, number)); err != nil {
			return err
		}
		d.numbers[what] = append(d.numbers[what], number)
	}
	for _, numbers := range d.numbers {
		slices.Sort(numbers)
	}
	return nil
}

// removeUnfinished takes what a crash left out of the way in one step: if somebody
// is still writing it, either it gets its name, whole, or he fails.
func removeUnfinished(dir, name string) error {
	suffix, err := randomHex(8)
	if err != nil {
		return err
	}
	gone := filepath.Join(dir, unfinished+"gone-"+suffix)
	if err := os.Rename(filepath.Join(dir, name), gone); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return os.RemoveAll(gone)
}

func parseGeneration(name string) (kind, int, bool) {
	what, digits, ok := strings.Cut(name, "-")
	number, err := strconv.Atoi(digits)
	if !ok || err != nil || number < 1 || digits != strconv.Itoa(number) {
		return "", 0, false
	}
	switch k := kind(what); k {
	case kindRoot, kindIntermediate, kindJWT, kindPolicy, kindLog, kindAnchor:
		return k, number, true
	}
	return "", 0, false
}

func (d *keyDir) folder(what kind, number int) string {
	return filepath.Join(d.path, string(what)+"-"+strconv.Itoa(number))
}

func (d *keyDir) holds(kinds ...kind) bool {
	return slices.ContainsFunc(kinds, func(k kind) bool { return len(d.numbers[k]) > 0 })
}

// newest loads the generation with the highest number; nil when there is none.
func (d *keyDir) newest(what kind) (*generation, error) {
	numbers := d.numbers[what]
	if len(numbers) == 0 {
		return nil, nil
	}
	return d.load(what, numbers[len(numbers)-1])
}

// all loads every generation of a kind, oldest first.
func (d *keyDir) all(what kind) ([]*generation, error) {
	var all []*generation
	for _, number := range d.numbers[what] {
		gen, err := d.load(what, number)
		if err != nil {
			return nil, err
		}
		all = append(all, gen)
	}
	return all, nil
}

// remove removes one generation.
func (d *keyDir) remove(gen *generation) error {
	if err := d.removeGeneration(gen.kind, gen.number); err != nil {
		return fmt.Errorf("remove a key: %w", err)
	}
	d.numbers[gen.kind] = slices.DeleteFunc(d.numbers[gen.kind], func(number int) bool { return number == gen.number })
	return durable.SyncDir(d.path)
}

func (d *keyDir) load(what kind, number int) (*generation, error) {
	folder := d.folder(what, number)
	if err := durable.CheckMode(folder, fs.ModeDir, 0o700); err != nil {
		return nil, err
	}
	gen := &generation{kind: what, number: number}
	if what != kindAnchor {
		var err error
		if gen.signer, err = d.loadSigner(what, number); err != nil {
			return nil, err
		}
	}
	cert, err := loadCert(filepath.Join(folder, certFile), gen.signer)
	uncertified := errors.Is(err, fs.ErrNotExist) && (what == kindJWT || what == kindPolicy || what == kindLog)
	if err != nil && !uncertified {
		return nil, err
	}
	gen.cert = cert
	gen.chain, err = readCerts(filepath.Join(folder, chainFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("load %s: %w", chainFile, err)
	}
	return gen, nil
}

func (d *keyDir) loadSigner(what kind, number int) (crypto.Signer, error) {
	name, err := d.keyURI(what, number)
	if err != nil {
		return nil, err
	}
	if name != "" {
		key, err := d.kms.load(name)
		return key.signer, err
	}
	path := filepath.Join(d.folder(what, number), sealedFile)
	text, err := readPrivate(path)
	if err != nil {
		return nil, err
	}
	if err := d.openKEK(); err != nil {
		return nil, err
	}
	private, err := openKey(d.kek, text, d.seat(what, number))
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", path, err)
	}
	signer, err := d.keys.CreateSigner(&kmsapi.CreateSignerRequest{SigningKeyPEM: pem.EncodeToMemory(&pem.Block{Type: clearType, Bytes: private})})
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", path, err)
	}
	return signer, nil
}

// keyURI is the name of a key in the KMS; empty: it is a file.
func (d *keyDir) keyURI(what kind, number int) (string, error) {
	text, err := readPrivate(filepath.Join(d.folder(what, number), uriFile))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return strings.TrimSpace(string(text)), err
}

func (d *keyDir) seat(what kind, number int) seat {
	return seat{trustDomain: d.trustDomain, kind: what, number: number}
}

// algorithms of the keys by what they are for.
var algorithms = map[kind]kmsapi.SignatureAlgorithm{
	kindRoot:         kmsapi.ECDSAWithSHA384,
	kindIntermediate: kmsapi.ECDSAWithSHA256,
	kindJWT:          kmsapi.ECDSAWithSHA256,
	kindPolicy:       kmsapi.ECDSAWithSHA256,
	kindLog:          kmsapi.PureEd25519, // as signed notes have it, by which the log speaks
}

// request asks for a key for what.
func (d *keyDir) request(what kind) *kmsapi.CreateKeyRequest {
	if what == kindJWT && d.rs256 {
		return &kmsapi.CreateKeyRequest{SignatureAlgorithm: kmsapi.SHA256WithRSA, Bits: rs256Bits}
	}
	return &kmsapi.CreateKeyRequest{SignatureAlgorithm: algorithms[what]}
}

// create makes a key, which add puts away, or discard removes.
func (d *keyDir) create(what kind) (madeKey, error) {
	if d.kms.makes(what) {
		return d.kms.create(what, d.request(what))
	}
	made, err := d.keys.CreateKey(d.request(what))
	if err != nil {
		return madeKey{}, fmt.Errorf("make a %s key: %w", what, err)
	}
	signer, err := d.keys.CreateSigner(&made.CreateSignerRequest)
	if err != nil {
		return madeKey{}, fmt.Errorf("make a %s key: %w", what, err)
	}
	return madeKey{signer: signer, private: made.PrivateKey}, nil
}

// discard removes a key that was made in the KMS for nothing, as when nobody
// certified it: it would be made again each minute. It returns err.
func (d *keyDir) discard(key madeKey, err error) error {
	if key.uri == "" {
		return err
	}
	return errors.Join(err, d.kms.remove(key.uri))
}

// loadCert reads the certificate of signer; nil: of somebody else.
func loadCert(path string, signer crypto.Signer) (*x509.Certificate, error) {
	text, err := readPrivate(path)
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" || len(rest) > 0 {
		return nil, fmt.Errorf("load %s: not one PEM certificate", path)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", path, err)
	}
	if signer == nil {
		return cert, nil
	}
	if key, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !key.Equal(cert.PublicKey) {
		return nil, fmt.Errorf("load %s: the certificate and the key beside it do not belong together", path)
	}
	return cert, nil
}

// add is put, for a key that is of no use where that fails.
func (d *keyDir) add(what kind, key madeKey, cert *x509.Certificate, chain ...*x509.Certificate) (*generation, error) {
	gen, err := d.put(what, key, cert, chain...)
	if err != nil {
		return nil, d.discard(key, err)
	}
	return gen, nil
}

// put puts a key away as the next generation of its kind; an anchor has none. When
// it returns without error, the key survives a crash.
func (d *keyDir) put(what kind, key madeKey, cert *x509.Certificate, chain ...*x509.Certificate) (*generation, error) {
	number := 1
	if numbers := d.numbers[what]; len(numbers) > 0 {
		number = numbers[len(numbers)-1] + 1
	}
	if err := d.write(what, number, key, cert, chain); err != nil {
		return nil, fmt.Errorf("put %s generation %d away: %w", what, number, err)
	}
	d.numbers[what] = append(d.numbers[what], number)
	return &generation{kind: what, number: number, signer: key.signer, cert: cert, chain: chain}, nil
}

func (d *keyDir) write(what kind, number int, key madeKey, cert *x509.Certificate, chain []*x509.Certificate) (err error) {
	temp, err := os.MkdirTemp(d.path, unfinished) // mode 0700
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(temp))
		}
	}()
	if what != kindAnchor {
		if err := d.writeKey(temp, key, d.seat(what, number)); err != nil {
			return err
		}
	}
	if cert != nil {
		if err := writeSynced(filepath.Join(temp, certFile), encodeCert(cert)); err != nil {
			return err
		}
	}
	if len(chain) > 0 {
		if err := writeSynced(filepath.Join(temp, chainFile), encodeCerts(chain)); err != nil {
			return err
		}
	}
	if err := durable.SyncDir(temp); err != nil {
		return err
	}
	// Fails when the generation exists: a folder is not replaced by a rename
	// unless it is empty.
	if err := os.Rename(temp, d.folder(what, number)); err != nil {
		return err
	}
	return durable.SyncDir(d.path)
}

func (d *keyDir) writeKey(folder string, key madeKey, at seat) error {
	if key.uri != "" {
		return writeSynced(filepath.Join(folder, uriFile), []byte(key.uri+"\n"))
	}
	sealed, err := d.sealSigner(key.private, at)
	if err != nil {
		return err
	}
	return writeSynced(filepath.Join(folder, sealedFile), sealed)
}

func (d *keyDir) sealSigner(private crypto.PrivateKey, at seat) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, err
	}
	if err := d.openKEK(); err != nil {
		return nil, err
	}
	return sealKey(d.kek, der, at)
}

func encodeCert(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

func encodeCerts(certs []*x509.Certificate) (text []byte) {
	for _, cert := range certs {
		text = append(text, encodeCert(cert)...)
	}
	return text
}

// certify puts a certificate beside the key of gen, in place of one that may be
// there, and returns the two together. A crash leaves all of it or nothing that
// counts.
func (d *keyDir) certify(gen *generation, cert *x509.Certificate) (*generation, error) {
	folder := d.folder(gen.kind, gen.number)
	if err := durable.WriteFile(folder, certFile, encodeCert(cert)); err != nil {
		return nil, fmt.Errorf("put the certificate of %s away: %w", folder, err)
	}
	certified := *gen
	certified.cert = cert
	return &certified, nil
}

// removeOlder removes the generations before gen of its kind.
func (d *keyDir) removeOlder(gen *generation) error {
	var errs []error
	d.numbers[gen.kind] = slices.DeleteFunc(d.numbers[gen.kind], func(number int) bool {
		if number >= gen.number {
			return false
		}
		err := d.removeGeneration(gen.kind, number)
		errs = append(errs, err)
		return err == nil
	})
	errs = append(errs, durable.SyncDir(d.path))
	return errors.Join(errs...)
}

// removeGeneration removes a key. The folder gets another name first: a crash
// leaves all of it, or nothing that counts, but perhaps a key in the KMS that
// nobody names any more.
func (d *keyDir) removeGeneration(what kind, number int) error {
	name, err := d.keyURI(what, number)
	if err != nil {
		return err
	}
	gone := filepath.Join(d.path, unfinished+string(what)+"-"+strconv.Itoa(number))
	if err := os.Rename(d.folder(what, number), gone); err != nil {
		return err
	}
	if name != "" && d.kms != nil {
		err = d.kms.remove(name)
	}
	return errors.Join(err, os.RemoveAll(gone))
}

func writeSynced(path string, text []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Sync(), f.Close())
}
