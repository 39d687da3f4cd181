// Keys on disk. A generation is a folder KIND-NUMBER with key.pem and, but for
// the JWT key, cert.pem; of its root a replica has the certificate alone, as
// "anchor". It is written under another name, synced,
// and renamed: a crash leaves all of it or nothing that counts, and two processes
// cannot make the same generation.

package upstream

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	kmsapi "go.step.sm/crypto/kms/apiv1"

	"merlon.dev/sdk/durable"
)

type kind string

const (
	kindRoot         kind = "root"
	kindIntermediate kind = "intermediate"
	kindJWT          kind = "jwt"
	kindPolicy       kind = "policy"
	kindAnchor       kind = "anchor"
)

const (
	keyFile  = "key.pem"
	certFile = "cert.pem"
	// Unfinished generations begin with a dot, which no kind does.
	unfinished = ".new-"
	maxPEM     = 64 << 10
)

// generation is one key with its certificate.
type generation struct {
	kind   kind
	number int
	signer crypto.Signer     // nil for an anchor
	cert   *x509.Certificate // nil for jwt, and for policy until it is certified
}

// keyDir is the folder. It is not safe for concurrent use.
type keyDir struct {
	path    string
	keys    kmsapi.KeyManager
	numbers map[kind][]int // generations that are there, ascending
}

// openKeyDir makes the folder when it is missing and removes what a crash left
// unfinished.
func openKeyDir(path string, keys kmsapi.KeyManager) (*keyDir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, err
	}
	if err := checkMode(path, fs.ModeDir, 0o700); err != nil {
		return nil, err
	}
	if err := durable.SyncDir(filepath.Dir(path)); err != nil { // or a crash takes the new folder away
		return nil, err
	}
	d := &keyDir{path: path, keys: keys, numbers: make(map[kind][]int)}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		if strings.HasPrefix(entry.Name(), unfinished) {
			if err := os.RemoveAll(filepath.Join(path, entry.Name())); err != nil {
				return nil, fmt.Errorf("remove an unfinished key: %w", err)
			}
			continue
		}
		what, number, ok := parseGeneration(entry.Name())
		if !ok {
			return nil, fmt.Errorf("%s does not belong here; move it elsewhere", filepath.Join(path, entry.Name()))
		}
		d.numbers[what] = append(d.numbers[what], number)
	}
	for _, numbers := range d.numbers {
		slices.Sort(numbers)
	}
	return d, nil
}

func parseGeneration(name string) (kind, int, bool) {
	what, digits, ok := strings.Cut(name, "-")
	number, err := strconv.Atoi(digits)
	if !ok || err != nil || number < 1 || digits != strconv.Itoa(number) {
		return "", 0, false
	}
	switch k := kind(what); k {
	case kindRoot, kindIntermediate, kindJWT, kindPolicy, kindAnchor:
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

func (d *keyDir) load(what kind, number int) (*generation, error) {
	folder := d.folder(what, number)
	if err := checkMode(folder, fs.ModeDir, 0o700); err != nil {
		return nil, err
	}
	gen := &generation{kind: what, number: number}
	if what != kindAnchor {
		keyPEM, err := readPrivate(filepath.Join(folder, keyFile))
		if err != nil {
			return nil, err
		}
		if gen.signer, err = d.keys.CreateSigner(&kmsapi.CreateSignerRequest{SigningKeyPEM: keyPEM}); err != nil {
			return nil, fmt.Errorf("load %s: %w", filepath.Join(folder, keyFile), err)
		}
	}
	cert, err := loadCert(filepath.Join(folder, certFile), gen.signer)
	uncertified := errors.Is(err, fs.ErrNotExist) && (what == kindJWT || what == kindPolicy)
	if err != nil && !uncertified {
		return nil, err
	}
	gen.cert = cert
	return gen, nil
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

// add puts a key away as the next generation of its kind; an anchor has none. When
// it returns without error, the key survives a crash.
func (d *keyDir) add(what kind, key crypto.PrivateKey, cert *x509.Certificate) (*generation, error) {
	signer, ok := key.(crypto.Signer)
	if !ok && what != kindAnchor {
		return nil, fmt.Errorf("put a %s key away: type %T does not sign", what, key)
	}
	number := 1
	if numbers := d.numbers[what]; len(numbers) > 0 {
		number = numbers[len(numbers)-1] + 1
	}
	if err := d.write(what, number, key, cert); err != nil {
		return nil, fmt.Errorf("put %s generation %d away: %w", what, number, err)
	}
	d.numbers[what] = append(d.numbers[what], number)
	return &generation{kind: what, number: number, signer: signer, cert: cert}, nil
}

func (d *keyDir) write(what kind, number int, key crypto.PrivateKey, cert *x509.Certificate) (err error) {
	temp, err := os.MkdirTemp(d.path, unfinished) // mode 0700
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(temp))
		}
	}()
	if key != nil {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		if err := writeSynced(filepath.Join(temp, keyFile), "PRIVATE KEY", der); err != nil {
			return err
		}
	}
	if cert != nil {
		if err := writeSynced(filepath.Join(temp, certFile), "CERTIFICATE", cert.Raw); err != nil {
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

// certify puts a certificate beside the key of gen, which had none. A crash leaves
// all of it or nothing that counts.
func (d *keyDir) certify(gen *generation, cert *x509.Certificate) error {
	folder := d.folder(gen.kind, gen.number)
	temp := filepath.Join(folder, unfinished+certFile)
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("put the certificate of %s away: %w", folder, err)
	}
	if err := writeSynced(temp, "CERTIFICATE", cert.Raw); err != nil {
		return fmt.Errorf("put the certificate of %s away: %w", folder, err)
	}
	if err := os.Rename(temp, filepath.Join(folder, certFile)); err != nil {
		return fmt.Errorf("put the certificate of %s away: %w", folder, err)
	}
	gen.cert = cert
	return durable.SyncDir(folder)
}

// removeOlder removes the generations before gen of its kind.
func (d *keyDir) removeOlder(gen *generation) error {
	var errs []error
	d.numbers[gen.kind] = slices.DeleteFunc(d.numbers[gen.kind], func(number int) bool {
		if number >= gen.number {
			return false
		}
		err := os.RemoveAll(d.folder(gen.kind, number))
		errs = append(errs, err)
		return err == nil
	})
	errs = append(errs, durable.SyncDir(d.path))
	return errors.Join(errs...)
}

func writeSynced(path, blockType string, der []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(pem.EncodeToMemory(&pem.Block{Type: blockType, Bytes: der}))
	return errors.Join(err, f.Sync(), f.Close())
}

// readPrivate reads a file that nobody else may read or replace. The file that is
// checked is the one that is read.
func readPrivate(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("read a key file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := checkInfo(path, info, 0, 0o600); err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxPEM+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxPEM {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxPEM)
	}
	return text, nil
}

func checkMode(path string, typ, max fs.FileMode) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	return checkInfo(path, info, typ, max)
}

func checkInfo(path string, info fs.FileInfo, typ, max fs.FileMode) error {
	if info.Mode().Type() != typ {
		return fmt.Errorf("%s is not a %s", path, map[fs.FileMode]string{0: "regular file", fs.ModeDir: "folder"}[typ])
	}
	if extra := info.Mode().Perm() &^ max; extra != 0 {
		return fmt.Errorf("%s has mode %#o, so others may read or change it; run: chmod %#o %s", path, info.Mode().Perm(), max, path)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() && st.Uid != 0 {
		return fmt.Errorf("%s belongs to user %d; run: chown %d %s", path, st.Uid, os.Geteuid(), path)
	}
	return nil
}
