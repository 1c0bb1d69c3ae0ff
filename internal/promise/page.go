// SPDX-License-Identifier: Apache-2.0

package promise

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Call is one call of Kept in the sources.
type Call struct {
	Area    Area
	Promise string
	Test    string // as in Record
	Dir     string // the package's folder below the root
}

// Calls finds the calls of Kept in the tests below root. It fails for one that the page cannot be made from: outside of a
// test function, or with an area or a promise that is no constant.
func Calls(root string) ([]Call, error) {
	var calls []Call
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		// This package's own tests promise nothing.
		if d.IsDir() && path != root && (strings.HasPrefix(d.Name(), ".") || path == filepath.Join(root, "internal", "promise")) {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		src, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(src, []byte("promise.Kept(")) {
			return err
		}
		found, err := callsIn(path, src)
		dir, _ := filepath.Rel(root, filepath.Dir(path))
		for i := range found {
			found[i].Dir = dir
			found[i].Test = filepath.Base(dir) + "." + found[i].Test
		}
		calls = append(calls, found...)
		return err
	})
	slices.SortFunc(calls, func(a, b Call) int {
		return cmp.Or(cmp.Compare(slices.Index(Areas, a.Area), slices.Index(Areas, b.Area)), cmp.Compare(a.Promise, b.Promise),
			cmp.Compare(a.Test, b.Test))
	})
	return slices.CompactFunc(calls, func(a, b Call) bool { return a == b }), err
}

// areaNames are the names of the constants in Areas, in their order.
var areaNames = []string{
	"Lifecycle", "Pressure", "Shield", "Masquerade", "Hostile", "Kernels", "Model", "Soak", "BadInput", "Cost",
}

func callsIn(path string, src []byte) ([]Call, error) {
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, path, src, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var calls []Call
	var errs []error
	for _, decl := range file.Decls {
		fn, ok := decl.(*ast.FuncDecl)
		if !ok || fn.Body == nil {
			continue
		}
		ast.Inspect(fn.Body, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || !isKept(call.Fun) {
				return true
			}
			bad := func(what string) bool {
				errs = append(errs, fmt.Errorf("%v: promise.Kept: %s", fset.Position(call.Pos()), what))
				return true
			}
			if !strings.HasPrefix(fn.Name.Name, "Test") && !strings.HasPrefix(fn.Name.Name, "Fuzz") {
				return bad("call it in the test function itself")
			}
			if len(call.Args) < 4 {
				return bad("wants t, area, promise, figure")
			}
			area, ok := call.Args[1].(*ast.SelectorExpr)
			if !ok || !slices.Contains(areaNames, area.Sel.Name) {
				return bad("the area is none of this package's constants")
			}
			text, err := constant(call.Args[2])
			if err != nil {
				return bad("the promise is no constant string")
			}
			calls = append(calls, Call{Area: Areas[slices.Index(areaNames, area.Sel.Name)], Promise: text, Test: fn.Name.Name})
			return true
		})
	}
	return calls, errors.Join(errs...)
}

func isKept(fun ast.Expr) bool {
	sel, ok := fun.(*ast.SelectorExpr)
	if !ok || sel.Sel.Name != "Kept" {
		return false
	}
	pkg, ok := sel.X.(*ast.Ident)
	return ok && pkg.Name == "promise"
}

// constant is the value of a string literal, or of several that are joined by +.
func constant(e ast.Expr) (string, error) {
	switch e := e.(type) {
	case *ast.BasicLit:
		return strconv.Unquote(e.Value)
	case *ast.BinaryExpr:
		x, errX := constant(e.X)
		y, errY := constant(e.Y)
		return x + y, errors.Join(errX, errY)
	}
	return "", errors.New("not a string literal")
}

// ReadRecords reads a file that Kept wrote. Of several records of one test and promise the last stands.
func ReadRecords(path string) ([]Record, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var records []Record
	lines := bufio.NewScanner(bytes.NewReader(raw))
	for lines.Scan() {
		var r Record
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		records = append(records, r)
	}
	return records, lines.Err()
}

// Merge gives the record of each call: the newer ones where there are such. Records without a call go.
func Merge(calls []Call, old, newer []Record) []Record {
	var out []Record
	for _, c := range calls {
		for _, r := range slices.Backward(slices.Concat(old, newer)) {
			if r.Test == c.Test && r.Promise == c.Promise && r.Area == c.Area {
				out = append(out, r)
				break
			}
		}
	}
	return out
}

// WriteRecords replaces the file by these records, one a line.
func WriteRecords(path string, records []Record) error {
	var buf bytes.Buffer
	for _, r := range records {
		line, err := json.Marshal(r)
		if err != nil {
			return err
		}
		buf.Write(append(line, '\n'))
	}
	return os.WriteFile(path, buf.Bytes(), 0o644)
}

// Page is docs/reliability.md. It fails for a call without a record: a promise whose figure nobody has seen.
func Page(calls []Call, records []Record) (string, error) {
	var b strings.Builder
	b.WriteString(`# What bpfnet promises, and what shows it

Each line is a promise, the test that fails without it, and what that test counted or measured in its last recorded run.
This page is made from the calls of promise.Kept in the tests and from [reliability/figures.jsonl](reliability/figures.jsonl);
` + "`make reliability`" + ` runs these tests and writes both. Times and rates are those of one small machine with two processors.
Where "a part" stands behind a figure, not all of the counts that ` + "`make test-full`" + ` runs were run.
`)
	var area Area
	var errs []error
	for _, c := range calls {
		at := slices.IndexFunc(records, func(r Record) bool { return r.Test == c.Test && r.Promise == c.Promise })
		if at < 0 {
			errs = append(errs, fmt.Errorf("%s: no figure is recorded for %q: run make reliability", c.Test, c.Promise))
			continue
		}
		if c.Area != area {
			area = c.Area
			fmt.Fprintf(&b, "\n## %s\n\n| promise | test | last figure |\n|---|---|---|\n", area)
		}
		figure := records[at].Figure
		if !records[at].Full {
			figure += " (a part)"
		}
		cell := strings.NewReplacer("|", "\\|", "\n", " ")
		fmt.Fprintf(&b, "| %s | `%s` | %s |\n", cell.Replace(c.Promise), c.Test, cell.Replace(figure))
	}
	return b.String(), errors.Join(errs...)
}
