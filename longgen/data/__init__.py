"""Turn files into packed training sequences: read, tokenize, split, pack, plant recall text."""

from longgen.data.corpus import CorpusView, TokenizedCorpus, check_vocabulary, split_heldout
from longgen.data.packing import PackedDataset, PackingReport, collate
from longgen.data.readers import Document
from longgen.data.recall import RecallText
from longgen.data.sources import Documents, SourcesReport, read_documents
from longgen.data.tokenized import TokenizeProgress, tokenize_documents

__all__ = [
    "CorpusView",
    "Document",
    "Documents",
    "PackedDataset",
    "PackingReport",
    "RecallText",
    "SourcesReport",
    "TokenizeProgress",
    "TokenizedCorpus",
    "check_vocabulary",
    "collate",
    "read_documents",
    "split_heldout",
    "tokenize_documents",
]
